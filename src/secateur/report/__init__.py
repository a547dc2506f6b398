"""What a run says of itself: counts from the written files, the model card, the tables people read."""
