"""Many runs, and the scaling laws they follow."""
