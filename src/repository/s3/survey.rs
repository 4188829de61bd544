//! Owns: what a look at an S3 store finds out, call by call, for `check`.
//! Does not own: how it is shown (`cli/check.rs`).

use bytes::Bytes;

use super::S3Backend;
use super::answer::{Action, Refusal};
use crate::repository::{Backend, Key, StoreError, StoreErrorKind, layout};

/// Requests are signed with the time; S3 refuses a difference of 15 min, and the SDK corrects one it has seen.
const CLOCK_DIFFERENCE_MS_MAX: i64 = 60_000;

/// One thing looked at.
#[derive(Clone, Debug)]
pub struct Finding {
    pub what: &'static str,
    pub outcome: Outcome,
}

#[derive(Clone, Debug)]
pub enum Outcome {
    Good(String),
    /// Works, with a reservation.
    Fair {
        found: String,
        cure: String,
    },
    Bad(StoreError),
}

impl Finding {
    fn good(what: &'static str, found: impl Into<String>) -> Finding {
        Finding { what, outcome: Outcome::Good(found.into()) }
    }

    fn fair(what: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Finding {
        Finding { what, outcome: Outcome::Fair { found: found.into(), cure: cure.into() } }
    }

    fn bad(what: &'static str, error: StoreError) -> Finding {
        Finding { what, outcome: Outcome::Bad(error) }
    }
}

impl S3Backend {
    /// Tries everything an agent does there. Leaves nothing behind but the probe object every writer needs anyway.
    pub async fn survey(&self, random: u32) -> Vec<Finding> {
        let mut findings = vec![match self.list(None).await {
            Ok(_) => Finding::good("store", format!("{} answers and may be listed", self.describe())),
            // Nothing else would be answered otherwise.
            Err(error) if !error.is(StoreErrorKind::PermissionDenied) => return vec![Finding::bad("store", error)],
            Err(error) => Finding::bad("store", error),
        }];
        let writable = self.conditional_writes().await;
        let may_write = !matches!(writable.outcome, Outcome::Bad(_));
        findings.push(writable);
        if may_write {
            findings.push(self.conditional_completion().await);
            findings.push(self.reading().await);
            findings.push(self.throwaway_objects(random).await);
        }
        findings.push(self.unfinished_uploads().await);
        findings.extend(self.clock());
        findings.extend(self.transport());
        findings
    }

    async fn conditional_writes(&self) -> Finding {
        const WHAT: &str = "conditional writes";
        match self.shared.honours_conditional_put().await {
            Ok(true) => Finding::good(WHAT, "objects can be stored, and a taken name is refused"),
            Ok(false) => Finding::fair(
                WHAT,
                "the store ignores conditions; `single_writer` vouches that nobody else writes",
                "make sure that no second agent or tool ever writes there, or use a store with conditional writes",
            ),
            Err(error) => Finding::bad(WHAT, error),
        }
    }

    async fn conditional_completion(&self) -> Finding {
        const WHAT: &str = "multipart uploads";
        match self.shared.honours_conditional_completion().await {
            Ok(true) => Finding::good(WHAT, "completed only under free names"),
            Ok(false) if self.shared.options.single_writer => Finding::good(WHAT, "possible, without conditions"),
            Ok(false) => Finding::fair(
                WHAT,
                "completed without conditions: the store may overwrite what another writer stores at that moment",
                "use one agent for each cluster there, or a store that honours If-None-Match on CompleteMultipartUpload",
            ),
            Err(refused) => Finding::bad(WHAT, self.failed(Action::CompleteUpload, None, refused)),
        }
    }

    async fn reading(&self) -> Finding {
        const WHAT: &str = "reading";
        let key = layout::conditional_probe();
        let read = async {
            let bytes = self.stat(&key).await?.unwrap_or_default();
            self.fetch(&key, 0..bytes).await
        };
        match read.await {
            Ok(_) => Finding::good(WHAT, "objects can be read back"),
            Err(error) => Finding::bad(WHAT, error),
        }
    }

    /// What needs objects that are deleted again: the right to delete, storage classes.
    async fn throwaway_objects(&self, random: u32) -> Finding {
        const WHAT: &str = "deleting";
        let key = layout::probe(random);
        let classes = &self.shared.options.storage_class;
        let classes: Vec<&String> = [&classes.wal, &classes.backup].into_iter().flatten().collect();
        // What is not there can be deleted by whoever may delete.
        match self.delete(&key).await {
            Ok(()) => {}
            Err(error) if error.is(StoreErrorKind::PermissionDenied) => {
                let untried = if classes.is_empty() { "" } else { "; storage classes were not tried" };
                return Finding::good(WHAT, format!("not allowed, and a writer need not be{untried}"));
            }
            Err(error) => return Finding::bad(WHAT, error),
        }
        for class in &classes {
            if let Err(error) = self.try_storage_class(&key, class).await {
                return Finding::bad("storage class", error);
            }
        }
        match classes.is_empty() {
            true => Finding::good(WHAT, "allowed"),
            false => Finding::good(WHAT, format!("allowed; storage classes {classes:?} are accepted")),
        }
    }

    async fn try_storage_class(&self, key: &Key, class: &str) -> Result<(), StoreError> {
        let body = Bytes::from_static(b"seawall check: may be deleted\n");
        let stored = self.shared.put_with_class(key, &body, class).await;
        // Also after a failure: it may have been stored.
        let deleted = self.delete(key).await;
        stored.map_err(|refused| self.failed(Action::Put, Some(key), refused))?;
        deleted
    }

    async fn unfinished_uploads(&self) -> Finding {
        const WHAT: &str = "unfinished uploads";
        match self.shared.list_uploads(None).await {
            Ok(page) => Finding::good(WHAT, format!("{} there, aborted when older than a day", page.uploads().len())),
            Err(refused) => Finding::fair(
                WHAT,
                refused.cause,
                "let a lifecycle rule of the bucket abort incomplete multipart uploads after some days: they cost as objects do",
            ),
        }
    }

    fn clock(&self) -> Option<Finding> {
        const WHAT: &str = "store's clock";
        let difference = self.shared.clock_difference_ms()?;
        let seconds = difference.abs() / 1000;
        Some(match difference.abs() > CLOCK_DIFFERENCE_MS_MAX {
            true => Finding::fair(
                WHAT,
                format!("{seconds} s {} this machine's", if difference > 0 { "ahead of" } else { "behind" }),
                "run an NTP client: requests are signed with the time, and leases are aged by it",
            ),
            false => Finding::good(WHAT, "agrees with this machine's"),
        })
    }

    fn transport(&self) -> Option<Finding> {
        let endpoint = self.shared.options.endpoint.as_deref().filter(|endpoint| super::is_open_wire(endpoint))?;
        Some(Finding::fair(
            "store's connection",
            format!("{endpoint}: not encrypted, requests and objects can be read and changed on the way"),
            "use an https endpoint",
        ))
    }

    fn failed(&self, action: Action, key: Option<&Key>, refused: Refusal) -> StoreError {
        self.shared.error(action, key, refused)
    }
}
