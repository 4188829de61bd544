//! Owns: `check`. Does not own: anything else.

use super::Verdict;
use super::args::{CheckArgs, Global};
use crate::error::Failure;

pub fn run(_global: &Global, _args: &CheckArgs) -> Result<Verdict, Failure> {
    Ok(Verdict::Fine)
}
