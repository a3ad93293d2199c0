"""What methods of this seam share, and pieces of them that stand by themselves."""
