"""Code that travels inside an exported pipeline: copied as it is, and run where there is no imm_scale."""
