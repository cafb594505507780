"""What state costs, and how much of it a budget buys."""
