"Does 4-bit keep the quality? Rates, methods, repairs, ranks and data sets, a record each in benchmarks/results."
