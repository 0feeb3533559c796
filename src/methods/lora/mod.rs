//! Low-rank adaptation.
