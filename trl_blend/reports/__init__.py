"""What a run says of itself: model cards, their metadata, training curves."""
