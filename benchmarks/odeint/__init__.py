"""Solves of `odeint`, beside torchdiffeq and diffrax."""
