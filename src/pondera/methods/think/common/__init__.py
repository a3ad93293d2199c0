"""What thinking methods share: each piece is stated once and taken by the methods that need it."""
