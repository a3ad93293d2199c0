"""What several objectives share: the α offset, schedules, flows from stop probabilities."""
