"""Operations on hidden states, through an output layer that is read tile by tile."""
