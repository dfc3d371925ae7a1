"""Arithmetic: reference, torch and Triton implementations behind one name each."""
