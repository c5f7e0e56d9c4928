"""Models on the Hub: exporting a mixed policy, cards, curves."""
