"""Models beyond memory, in the shortest form: what is fetched when, what it costs, and when the fetch is hidden."""
