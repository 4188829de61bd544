//! Owns: whether a store honours conditions on writes: tried once, on an object of its own, before the first write.
//! Does not own: what is done where it does not (`put.rs`, `multipart.rs`).
//! Rests on `proto-notes/08-durability.md`, "an object in S3".
//!
//! A store that ignores `If-None-Match` answers success and overwrites. So the probe object stays for ever: whoever
//! tries to create it again must be refused. It needs no right to delete, and costs one small request in each process.

use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::answer::{Action, Refusal, Reply};
use super::client::Shared;
use crate::repository::{StoreError, StoreErrorKind, layout};

const PROBE: &[u8] = b"Seawall tries here whether the store honours If-None-Match. Keep it: it is never read.\n";
/// A store that does not honour conditions is asked again after this time: it may have been upgraded. While writes are
/// refused somebody waits for that.
const ASK_AGAIN_WHEN_REFUSED: Duration = Duration::from_secs(60);
const ASK_AGAIN: Duration = Duration::from_secs(3600);

/// What has been found out.
#[derive(Debug, Default)]
pub(super) struct Capabilities {
    put: Mutex<Option<Found>>,
    completion: Mutex<Option<Found>>,
}

#[derive(Clone, Copy, Debug)]
struct Found {
    honoured: bool,
    at: Instant,
}

impl Found {
    /// A store that honours conditions goes on doing so.
    fn counts(&self, ask_again: Duration) -> bool {
        self.honoured || self.at.elapsed() < ask_again
    }
}

impl Shared {
    /// Refuses stores on which names cannot be protected, unless the operator vouches for a single writer.
    pub(super) async fn may_write(&self) -> Result<(), StoreError> {
        self.honours_conditional_put().await.map(drop)
    }

    /// Whether creating an object can be made to fail when its name is taken. `false` only for a single writer.
    pub(super) async fn honours_conditional_put(&self) -> Result<bool, StoreError> {
        let honoured = self.probe_put().await.map_err(|refused| {
            let key = layout::conditional_probe();
            self.error(Action::Put, Some(&key), refused)
        })?;
        if honoured || self.options.single_writer {
            return Ok(honoured);
        }
        let cause = "the store ignores `If-None-Match: *`, so another writer's objects could be overwritten";
        let refused = Refusal::new(StoreErrorKind::Misconfigured, cause).hinted(
            "use a store with conditional writes (AWS, MinIO, R2, …); or, if no other agent or tool will ever write there, set `single_writer = true` for this repository",
        );
        Err(self.error(Action::Put, None, refused))
    }

    pub(super) async fn probe_put(&self) -> Result<bool, Refusal> {
        let ask_again = if self.options.single_writer { ASK_AGAIN } else { ASK_AGAIN_WHEN_REFUSED };
        let mut found = self.capabilities.put.lock().await;
        if let Some(found) = found.as_ref().filter(|found| found.counts(ask_again)) {
            return Ok(found.honoured);
        }
        // The first success creates the object, where the repository is new; the second has no excuse.
        let honoured = !self.probe_put_succeeds().await? || !self.probe_put_succeeds().await?;
        *found = Some(Found { honoured, at: Instant::now() });
        Ok(honoured)
    }

    async fn probe_put_succeeds(&self) -> Result<bool, Refusal> {
        let put = |client: Client| {
            let name = self.name(&layout::conditional_probe());
            let body = ByteStream::from_static(PROBE);
            client.put_object().bucket(&self.options.bucket).key(name).if_none_match("*").body(body).send()
        };
        match self.send(Action::Put, put).await {
            Ok(_) => Ok(true),
            Err(refused) if refused.reply == Reply::Exists => Ok(false),
            // A store that knows the header well enough to refuse it does not honour it.
            Err(refused) if refused.reply == Reply::NotImplemented => Ok(true),
            Err(refused) => Err(refused),
        }
    }

    /// Whether completing a multipart upload can be made to fail when the name is taken.
    pub(super) async fn honours_conditional_completion(&self) -> Result<bool, Refusal> {
        if !self.probe_put().await? {
            return Ok(false);
        }
        let mut found = self.capabilities.completion.lock().await;
        if let Some(found) = found.as_ref().filter(|found| found.counts(ASK_AGAIN)) {
            return Ok(found.honoured);
        }
        let honoured = self.probe_completion().await?;
        *found = Some(Found { honoured, at: Instant::now() });
        if !honoured {
            tracing::warn!(
                repository = self.url(),
                "the store completes multipart uploads without conditions: names are looked at before, not protected"
            );
        }
        Ok(honoured)
    }

    async fn probe_completion(&self) -> Result<bool, Refusal> {
        let key = layout::conditional_probe();
        let id = self.create_upload(&key, "probe").await?;
        let tried = async {
            let part = self.upload_part(&key, &id, 1, &[Bytes::from_static(PROBE)]).await?;
            match self.complete_upload(&key, &id, &[part], true).await {
                Ok(()) => Ok(false),
                Err(refused) if refused.reply == Reply::Unclear => Ok(false),
                Err(refused) if refused.reply == Reply::Exists => Ok(true),
                Err(refused) if refused.reply == Reply::NotImplemented => Ok(false),
                Err(refused) => Err(refused),
            }
        };
        let tried = tried.await;
        // What stays, an abort at a later start or the bucket's lifecycle rule removes.
        if let Err(refused) = self.abort_upload(&self.name(&key), &id).await {
            tracing::debug!(cause = refused.cause, "the probe's upload stays unfinished");
        }
        tried
    }
}
