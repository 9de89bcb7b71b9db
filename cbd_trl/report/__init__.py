"""What a chain is worth, measured: the sweep over sizes and operators, its tables and its picture."""
