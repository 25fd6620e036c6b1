"""What the scripts share and a reader of the method can skip: nothing in here imports from the level above."""
