"""The methods, by area: one module or package per feature; no host and no device is imported here."""
