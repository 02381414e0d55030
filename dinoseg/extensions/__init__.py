"""Capabilities beyond the core, a package for each. The core imports none, and each can be deleted."""
