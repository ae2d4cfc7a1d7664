"""Where simulated nodes run: in this process, in workers, on Ray."""
