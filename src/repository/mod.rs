//! The repository: create-only objects under names that promise their content.
//!
//! Owns: object names (`layout`), the store interface (`backend`) and its implementations.
//! Does not own: what the objects mean (`catalog`), when they are written (`archiver`).
//! Rests on `proto-notes/07-repository-format.md` and `08-durability.md`.

mod backend;
pub mod durable;
pub mod layout;
mod local;
mod metered;
pub mod s3;

pub use backend::{Backend, Entry, Facts, Key, StoreError, StoreErrorKind, Upload};
pub use local::{LocalBackend, THREADS_PER_ROOT};
pub use metered::MeteredBackend;
pub use s3::S3Backend;
