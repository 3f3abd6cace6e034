"""One module per library, each with the measurements that the library can do.

A measurement is a function (problem, masked model, clock, settings…) that prepares what the library needs, times what
is compared by `with clock.running()`, and returns a dict: `scores`, removal effects (N, Q) up to a positive factor,
where there are any; `parameters`, how many parameters they come from; anything else that the tables show. A
measurement that a library cannot do raises, and the message stands in the table.
"""
