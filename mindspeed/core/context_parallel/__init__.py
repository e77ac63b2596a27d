"""Context parallelism: a sequence split over devices, in seven ways, exact in each."""
