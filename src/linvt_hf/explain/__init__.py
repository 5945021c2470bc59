"""What an answer was read from, in pictures, and whether the pictures are true. Stays at home; the numbers travel."""
