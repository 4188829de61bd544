//! Owns: the files of a backup's volumes against its manifest, as their bytes pass: every one there once, as long and with
//! the checksum the server gave it, and nothing else.
//! Does not own: reading volumes (`content.rs`), restoring them (`restore`).
//! Pure.

use std::sync::{Arc, Mutex};

use super::content::Sink;
use crate::catalog::manifest::{ChecksumAlgorithm, FileHasher, Manifest};
use crate::codec::tar::{Member, MemberKind, TarEvent, TarParser, shown};

/// Missing files that are named; the others are counted.
const NAMED_MAX: usize = 3;

/// Which files of a manifest were met.
#[derive(Clone, Debug)]
pub struct Accounts {
    manifest: Arc<Manifest>,
    met: Arc<Mutex<Vec<bool>>>,
}

impl Accounts {
    pub fn new(manifest: Manifest) -> Accounts {
        let met = vec![false; manifest.files.len()];
        Accounts { manifest: Arc::new(manifest), met: Arc::new(Mutex::new(met)) }
    }

    /// What a volume has met is taken back: it is read again.
    fn forget(&self, files: &[usize]) {
        let mut met = self.met.lock().expect("no holder panics");
        files.iter().for_each(|&index| met[index] = false);
    }

    /// False when it was met before.
    fn meet(&self, index: usize) -> bool {
        !std::mem::replace(&mut self.met.lock().expect("no holder panics")[index], true)
    }

    /// What no volume held; `None` when nothing is missing.
    pub fn missing(&self) -> Option<String> {
        let met = self.met.lock().expect("no holder panics");
        let missing: Vec<usize> = (0..met.len()).filter(|&index| !met[index]).collect();
        let names =
            missing.iter().take(NAMED_MAX).map(|&index| format!("\"{}\"", shown(self.manifest.files.path(index))));
        let named = names.collect::<Vec<_>>().join(", ");
        match missing.len() {
            0 => None,
            count if count <= NAMED_MAX => Some(format!("the manifest lists {named}, and no volume holds it")),
            count => {
                Some(format!("the manifest lists {named} and {} more, and no volume holds them", count - NAMED_MAX))
            }
        }
    }
}

/// One volume.
#[derive(Debug)]
pub struct VolumeFiles {
    accounts: Accounts,
    /// Of its paths in the manifest.
    prefix: Vec<u8>,
    is_base: bool,
    parser: TarParser,
    current: Option<Current>,
    met: Vec<usize>,
    fault: Option<String>,
}

#[derive(Debug)]
struct Current {
    index: usize,
    hasher: FileHasher,
}

impl VolumeFiles {
    /// `tablespace` is its OID; `None`: PGDATA.
    pub fn new(accounts: Accounts, tablespace: Option<u32>, raw_bytes: u64) -> VolumeFiles {
        let prefix = tablespace.map_or(String::new(), |oid| format!("pg_tblspc/{oid}/")).into_bytes();
        VolumeFiles {
            accounts,
            prefix,
            is_base: tablespace.is_none(),
            parser: TarParser::new(raw_bytes),
            current: None,
            met: Vec::new(),
            fault: None,
        }
    }

    /// What was wrong; nothing of it counts then.
    pub fn finish(mut self) -> Option<String> {
        let fault = self.fault.take().or_else(|| self.parser.finish().err().map(|error| error.to_string()));
        if fault.is_some() {
            self.accounts.forget(&self.met);
        }
        fault
    }

    /// It is not judged by what it holds: its bytes are not the right ones.
    pub fn give_up(self) {
        self.accounts.forget(&self.met);
    }

    fn read(&mut self, mut raw: &[u8]) -> Result<(), String> {
        loop {
            match self.parser.next(&mut raw).map_err(|error| error.to_string())? {
                None => return Ok(()),
                Some(TarEvent::Member { member, .. }) => {
                    let (path, kind, size) = (listed(&self.prefix, member), member.kind.clone(), member.size);
                    self.current = self.begin(&path, &kind, size)?;
                }
                Some(TarEvent::Data(data)) => {
                    if let Some(current) = &mut self.current {
                        current.hasher.update(data);
                    }
                }
                Some(TarEvent::MemberEnd) => self.end()?,
                Some(TarEvent::Padding(_) | TarEvent::End) => {}
            }
        }
    }

    fn begin(&mut self, path: &[u8], kind: &MemberKind, size: u64) -> Result<Option<Current>, String> {
        let name = || shown(path);
        match kind {
            MemberKind::Directory => return Ok(None),
            // Where a tablespace was.
            MemberKind::Symlink(_) if self.is_base && path.starts_with(b"pg_tblspc/") => return Ok(None),
            MemberKind::File => {}
            _ => return Err(format!("member \"{}\" is neither a file nor a directory", name())),
        }
        let files = &self.accounts.manifest.files;
        let index = files.find(path).ok_or_else(|| format!("the manifest does not list member \"{}\"", name()))?;
        let expected = files.file(index);
        if size != expected.size {
            return Err(format!("\"{}\" has {size} bytes, the manifest says {}", name(), expected.size));
        }
        if !self.accounts.meet(index) {
            return Err(format!("\"{}\" comes a second time", name()));
        }
        self.met.push(index);
        Ok(Some(Current { index, hasher: FileHasher::new(expected.checksum.algorithm()) }))
    }

    fn end(&mut self) -> Result<(), String> {
        let Some(Current { index, hasher }) = self.current.take() else { return Ok(()) };
        let expected = self.accounts.manifest.files.file(index);
        let found = hasher.finish();
        if expected.checksum.algorithm() == ChecksumAlgorithm::None || found == expected.checksum {
            return Ok(());
        }
        let (path, algorithm) = (shown(&expected.path), found.algorithm());
        Err(format!("{algorithm} of \"{path}\" is {found}, the manifest says {}", expected.checksum))
    }
}

impl Sink for VolumeFiles {
    fn take(&mut self, raw: &[u8]) {
        if self.fault.is_none() {
            self.fault = self.read(raw).err();
        }
    }
}

fn listed(prefix: &[u8], member: &Member) -> Vec<u8> {
    [prefix, member.path.as_slice()].concat()
}
