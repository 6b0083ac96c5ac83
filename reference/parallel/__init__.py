"""Many ranks as a one-process program: a rank is an element of a list, a collective a function of lists."""
