"""What memories share: the layer that attention meets, the table of slots, budgets, attention over what is kept."""
