//! Owns: `gaps`. Does not own: anything else.

use super::Verdict;
use super::args::{GapsArgs, Global};
use crate::error::Failure;

pub fn run(_global: &Global, _args: &GapsArgs) -> Result<Verdict, Failure> {
    Ok(Verdict::Fine)
}
