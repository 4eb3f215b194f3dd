"""Which layers live where, and what that costs in memory and time. Arithmetic on headers: no torch, no weights."""
