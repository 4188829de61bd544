//! Owns: encryption of whole objects to age X25519 recipients, and their decryption; the only use of age.
//! Does not own: which objects are encrypted (`archiver`), where keys are configured.

use std::str::FromStr;
use std::sync::Arc;

/// Public keys: whoever holds one of the identities that belong to them can read.
#[derive(Clone)]
pub struct Recipients(Arc<Vec<age::x25519::Recipient>>);

impl std::fmt::Debug for Recipients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(ToString::to_string)).finish()
    }
}

impl Recipients {
    /// `age1…` public keys, at least one.
    pub fn parse(keys: &[String]) -> Result<Recipients, String> {
        if keys.is_empty() {
            return Err("at least one age recipient (age1…)".into());
        }
        let parse = |key: &String| {
            age::x25519::Recipient::from_str(key.trim())
                .map_err(|why| format!("{key:?} is no age X25519 recipient: {why}"))
        };
        Ok(Recipients(Arc::new(keys.iter().map(parse).collect::<Result<_, _>>()?)))
    }
}
