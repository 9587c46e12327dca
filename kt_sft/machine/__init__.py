"""The ground floor: what this machine has and allows, asked without torch. For everyone."""
