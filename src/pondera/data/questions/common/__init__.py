"""Code that several kinds of questions share."""
