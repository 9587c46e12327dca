"""The edges: one module for each program that kt_sft plugs into."""
