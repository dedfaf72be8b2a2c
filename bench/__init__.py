"""What delivering costs: the gateway under load, and what people use instead in the same run."""
