"""Will execute a policy on real memory tiers, copies overlapped with compute; empty until a later version."""
