//! skeleton
pub mod index;
