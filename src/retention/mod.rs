//! Retention: what stays in a repository, what goes, and why.
//!
//! Owns: the rules ([`policy`]), what one repository holds of one lineage ([`inventory`]) and what that means (`survey`), how
//! old anything in it is ([`calendar`]), what needs what (`needs`), and the verdict on every object ([`mod@plan`]);
//! proto-notes/10-retention.md.
//! Does not own: reading a repository (`catalog/store`), carrying a plan out (`apply`), when that is done (`agent`).
//!
//! Everything but `apply` is pure: a plan follows from an inventory, a policy and the time of day alone, and every rule is
//! decided for keeping more where it could be read two ways:
//!
//! * Any rule that keeps a thing outranks all that do not. A policy without rules removes nothing.
//! * What a backup needs is kept with it: all that it builds on, and WAL. Without a pin or a `wal` age that is all WAL from
//!   its start on, along every line of history that leads through it, over holes too: a hole may yet be healed.
//! * While no backup of the newest line can be restored, no backup and no WAL of that line goes. While no backup can be
//!   restored at all, none goes, and no WAL.
//! * A rule about full backups (`count`, the age `full`) keeps what is built on them too, unless an age is given for that
//!   type. A type that no rule speaks of stays.
//! * `wal` begins at the newest kept backup that is consistent at or before it, so that WAL younger than it is of use.
//! * Ages are counted on the archive's own calendar (`calendar.rs`): a clock that jumped makes nothing old.

pub mod calendar;
pub mod inventory;
mod needs;
pub mod plan;
pub mod policy;
mod survey;

pub use inventory::{
    Announcement, Completed, Debris, DebrisKind, HeldBackup, HeldIndex, HeldPin, HeldSegment, Inventory,
};
pub use plan::{BackupVerdict, Fate, IndexVerdict, Outcome, Plan, Standing, WalVerdict, plan};
pub use policy::{Ages, Gfs, Policy};
