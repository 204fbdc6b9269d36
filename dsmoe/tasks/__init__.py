"""Tasks: what is drawn from noise, and what conditions it."""
