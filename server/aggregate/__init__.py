"""From accepted deltas to the next model: averages, robust ones, the server's optimizer, balance."""
