"""What "equal" means: op records, error budgets, input strategies, assertions and reports."""
