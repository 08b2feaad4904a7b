"""The same numbers, sooner or in less memory. Nothing here is needed to understand the method."""
