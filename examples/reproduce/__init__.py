"""Scripts that check the papers' claims on the add3cot test-bed."""
