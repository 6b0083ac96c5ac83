"""How much faster: side-by-side measurements that anyone can run."""
