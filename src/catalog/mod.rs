//! The catalog: what a lineage holds, read from its objects (proto-notes/07-repository-format.md).
//!
//! Owns: the JSON formats (`index`, `ledger`, `lineage`, `backup`), what a directory listing says (`contents`), which tails
//! count (`tails`), several repositories together (`union`), what happened (`events`), and reading all of it from a store (`store`).
//! Owns: the JSON formats (`index`, `ledger`, `lineage`, `backup`), whose a lease is (`lease`), what a directory listing says (`contents`), which tails
//! count (`tails`), several repositories together (`union`, and `shelf` for backups), and reading all of it from a store (`store`).
//! Does not own: names (`repository::layout`), when objects are written (`archiver`), intervals and gaps (`continuity`).

pub mod backup;
pub mod contents;
pub mod damage;
pub mod events;
pub mod index;
pub mod lease;
pub mod ledger;
pub mod lineage;
pub mod manifest;
pub mod shelf;
pub mod store;
pub mod tails;
pub mod union;

pub use backup::{BackupFile, BackupRecord, BeginFile, LeaseFile, PinFile};
pub use contents::{Catalog, DirectoryContents, Piece, SegmentObject, Source, TailObject, TimelineState};
pub use damage::{Damage, Damages};
pub use index::{Crc32, IndexEntry, IndexFile};
pub use ledger::{Expired, FactKind, LedgerFact, SegmentRange};
pub use lineage::{LineageFile, RepositoryFile, WriterFile};
pub use store::{Archive, CatalogError};
pub use tails::{TailChain, TailLink};
pub use union::Holdings;
