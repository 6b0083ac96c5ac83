"""What is computed: configs, weights, conventions and protocols. No mathematics."""
