//! The planner against an oracle that knows nothing of it: a model archive (`model`) lives through backups of every type,
//! forks, holes, damage, pins, clocks that jump, and expires that stop anywhere; after each of them everything that was
//! promised and could be restored can still be restored, by walking the objects one by one (`oracle`).
//!
//! Seeds are fixed, so that a run is the same everywhere; `SEAWALL_RETENTION_SEEDS=from..to` runs others.

mod cases;
mod directed;
mod model;
mod oracle;
mod scenario;
