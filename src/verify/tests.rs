//! Every kind of damage, one by one.
