"""What a run leaves for its readers: model cards and the picture of its curves. Nothing here knows a trainer."""
