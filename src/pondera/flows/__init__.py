"""GFlowNets: environments as tensor programs, exact laws of small ones, samplers, training and its report."""
