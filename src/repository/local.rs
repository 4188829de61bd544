//! Owns: a repository in a directory: which file an object is, what a failing call means to the caller.
//! Does not own: how a file becomes durable (`durable.rs`), names (`layout.rs`), retries (the caller).
//! Rests on `proto-notes/07-repository-format.md` and `08-durability.md`.
//!
//! Every operation starts at the root and checks that it is still the one it was: a volume that is not mounted
//! shows an empty directory in its place, and writing there would look like success until it is mounted again.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::FileType;
use tokio::sync::Semaphore;

use super::durable::{self, Directory, TEMP_PREFIX, TempFile};
use super::{Backend, Entry, Facts, Key, StoreError, StoreErrorKind, Upload, layout};

/// An operation that takes longer is reported as unavailable; a hung disk or NFS server may still carry it out.
/// Larger: an outage is noticed later. Smaller: a slow disk in a write-back storm looks like an outage.
const DEADLINE: Duration = Duration::from_secs(60);
/// The slowest disk that still counts as working: the deadline grows by the size of what is moved.
const SLOWEST_BYTES_PER_SECOND: u64 = 4 << 20;
/// Operations in the hands of the kernel, each on a thread of its own. A hung disk holds this many and no more: the
/// pool they come from must have more, for every other root and for everything else.
pub const THREADS_PER_ROOT: usize = 32;
/// Appended parts are gathered up to this size, so that small ones do not cost a call each.
const UPLOAD_BUFFER_BYTES: usize = 256 << 10;
/// Paths remembered as durable. Beyond it all are forgotten, which costs one sync each.
const SYNCED_DIRECTORIES_MAX: usize = 4096;
/// How often a write starts again because a delete removed the emptied directory under it.
const PRUNE_RACES_MAX: usize = 16;
/// Names looked at in one run of [`LocalBackend::clean_debris`], newest directories first.
const DEBRIS_NAMES_MAX: usize = 200_000;
/// The kernel has long written back a directory that did not change for this time.
const WRITTEN_BACK_AFTER: Duration = Duration::from_secs(3600);

/// A repository in a directory; `file:///…`. Clones share what one root may use.
#[derive(Clone, Debug)]
pub struct LocalBackend {
    shared: Arc<Shared>,
    permits: Arc<Semaphore>,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    volume: Mutex<Volume>,
    /// Directories whose path this process has made durable, and need not again.
    synced: Mutex<HashSet<String>>,
}

/// What the root was when it was first seen.
#[derive(Debug, Default)]
struct Volume {
    device_and_inode: Option<(u64, u64)>,
    /// The content of `repository.json`, which holds a random id: by it a volume is known again that was mounted
    /// anew under another device number.
    marker: Option<Vec<u8>>,
}

impl LocalBackend {
    /// Looks at nothing yet: a hung disk must not hold up whoever has others. Where the root is missing the operations
    /// fail, until it is there.
    pub fn open(root: PathBuf) -> LocalBackend {
        let root = std::path::absolute(&root).unwrap_or(root);
        let shared = Shared { root, volume: Mutex::default(), synced: Mutex::default() };
        LocalBackend { shared: Arc::new(shared), permits: Arc::new(Semaphore::new(THREADS_PER_ROOT)) }
    }

    /// The same root for somebody else, who may use it at another time: what it is is told anew, but a hung disk holds
    /// as many threads as for one.
    pub fn beside(&self) -> LocalBackend {
        LocalBackend { permits: self.permits.clone(), ..LocalBackend::open(self.shared.root.clone()) }
    }

    /// Removes temporary files that nobody writes and that were not touched for `older_than`, and directories
    /// left empty. Returns the number of files removed. What it does not reach in one run is left to the next.
    pub async fn clean_debris(&self, older_than: Duration) -> Result<usize, StoreError> {
        // As much time as for moving this: reading a bounded number of names.
        let bytes = DEBRIS_NAMES_MAX as u64 * 4096;
        let operation = Operation { verb: "clean", location: self.describe(), bytes };
        self.run(operation, move |shared| clean_debris(shared, older_than)).await
    }

    fn operation(&self, verb: &'static str, key: &Key, bytes: u64) -> Operation {
        Operation { verb, location: format!("{}/{key}", self.describe()), bytes }
    }

    /// Runs blocking work on a thread of its own, within a deadline. When the caller goes away, or the deadline
    /// passes, the work goes on to its end: it may or may not take effect, never partly.
    async fn run<T: Send + 'static>(
        &self,
        operation: Operation,
        work: impl FnOnce(&Shared) -> Result<T, Failed> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shared = Arc::clone(&self.shared);
        let permits = Arc::clone(&self.permits);
        let deadline = DEADLINE + Duration::from_secs(operation.bytes / SLOWEST_BYTES_PER_SECOND);
        let on_thread = async {
            let permit = permits.acquire_owned().await.expect("the semaphore is never closed");
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                work(&shared)
            })
            .await
        };
        let result = match tokio::time::timeout(deadline, on_thread).await {
            Err(_) => Err(Failed::new(StoreErrorKind::Unavailable, format!("no answer within {deadline:?}"))),
            Ok(Err(join)) if join.is_panic() => std::panic::resume_unwind(join.into_panic()),
            Ok(Err(_)) => Err(Failed::new(StoreErrorKind::Unavailable, "the program is shutting down".to_string())),
            Ok(Ok(result)) => result,
        };
        result.map_err(|failed| operation.error(failed))
    }
}

#[async_trait]
impl Backend for LocalBackend {
    fn describe(&self) -> String {
        format!("file://{}", self.shared.root.display())
    }

    /// Durably, mode 0700.
    async fn create_root(&self) -> Result<(), StoreError> {
        let operation = Operation { verb: "create", location: self.describe(), bytes: 0 };
        self.run(operation, |shared| {
            let directory = durable::create_directory(&shared.root)?;
            let mut volume = lock(&shared.volume);
            volume.device_and_inode = Some(directory.identity()?);
            Ok(())
        })
        .await
    }

    async fn look_anew(&self) -> Result<(), StoreError> {
        let operation = Operation { verb: "read", location: self.describe(), bytes: 0 };
        self.run(operation, Shared::look_anew).await
    }

    async fn create_missing_root(&self) -> Result<(), StoreError> {
        let parent = self.shared.root.parent().unwrap_or(Path::new("/")).to_path_buf();
        let operation = Operation { verb: "create", location: self.describe(), bytes: 0 };
        self.run(operation, move |_| match parent.is_dir() {
            true => Ok(()),
            false => {
                Err(Failed::new(StoreErrorKind::RootMissing, format!("there is no directory {}", parent.display())))
            }
        })
        .await?;
        self.create_root().await
    }

    async fn put_new_with(&self, key: &Key, body: &[Bytes], _facts: &Facts) -> Result<(), StoreError> {
        let operation = self.operation("store", key, body.iter().map(|part| part.len() as u64).sum());
        let (key, body) = (key.clone(), body.to_vec());
        self.run(operation, move |shared| {
            let mut temp = shared.new_file(&key, Shared::in_free_place)?;
            temp.write(&body)?;
            Ok(temp.persist_new(key.file_name())?)
        })
        .await
    }

    async fn begin_upload(&self, key: &Key) -> Result<Box<dyn Upload>, StoreError> {
        let new = key.clone();
        let temp = self
            .run(self.operation("store", key, 0), move |shared| {
                shared.new_file(&new, |directory, _| TempFile::create(directory))
            })
            .await?;
        let file = UploadFile { temp, gathered: Vec::new(), gathered_bytes: 0, written: 0 };
        Ok(Box::new(LocalUpload { backend: self.clone(), key: key.clone(), file: Some(file) }))
    }

    async fn stat(&self, key: &Key) -> Result<Option<u64>, StoreError> {
        let object = key.clone();
        self.run(self.operation("read", key, 0), move |shared| match shared.root()?.stat_link(object.as_str()) {
            Ok(stat) => Ok((FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some(size(&stat))),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error.into()),
        })
        .await
    }

    async fn fetch(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let operation = self.operation("read", key, range.end.saturating_sub(range.start));
        let object = key.clone();
        self.run(operation, move |shared| {
            let file = shared.root()?.open_file(object.as_str()).map_err(Failed::of_object)?;
            if !file.metadata()?.is_file() {
                return Err(Failed::new(StoreErrorKind::NotFound, "not a file".to_string()));
            }
            read_exactly(file, range)
        })
        .await
    }

    async fn list(&self, directory: Option<&Key>) -> Result<Vec<Entry>, StoreError> {
        let location = directory.map_or(self.describe(), |key| format!("{}/{key}", self.describe()));
        let directory = directory.cloned();
        self.run(Operation { verb: "list", location, bytes: 0 }, move |shared| {
            let root = shared.root()?;
            let opened = directory.as_ref().map_or(root.open_below("."), |key| root.open_below(key.as_str()));
            match opened {
                Ok(directory) => list(&directory),
                Err(error) if is_absent(&error) => Ok(Vec::new()),
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let object = key.clone();
        self.run(self.operation("delete", key, 0), move |shared| shared.delete(&[object])).await
    }

    /// One sync for each directory: on a journaling file system every one holds up the writers beside it.
    async fn delete_all(&self, keys: &[Key]) -> Result<(), StoreError> {
        let Some(first) = keys.first() else { return Ok(()) };
        let objects = keys.to_vec();
        self.run(self.operation("delete", first, 0), move |shared| shared.delete(&objects)).await
    }

    /// All together, and one by one where one of them stays.
    async fn delete_each(&self, keys: &[Key]) -> Result<Vec<(Key, StoreError)>, StoreError> {
        let mut kept = Vec::new();
        match self.delete_all(keys).await {
            Err(error) if error.is(StoreErrorKind::PermissionDenied) => {}
            deleted => return deleted.map(|()| kept),
        }
        for key in keys {
            match self.delete(key).await {
                Err(error) if error.is(StoreErrorKind::PermissionDenied) => kept.push((key.clone(), error)),
                deleted => deleted?,
            }
        }
        Ok(kept)
    }
}

impl Shared {
    fn open_root(&self) -> Result<Directory, Failed> {
        Directory::open(&self.root).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                Failed::new(StoreErrorKind::RootMissing, format!("{}: {error}", self.root.display()))
            }
            _ => error.into(),
        })
    }

    /// Another directory that says it is a repository was made one by somebody; one that says nothing is the mount
    /// point of a volume that is away.
    fn look_anew(&self) -> Result<(), Failed> {
        let directory = self.open_root()?;
        if let Some(marker) = read_marker(&directory) {
            *lock(&self.volume) = Volume { device_and_inode: Some(directory.identity()?), marker: Some(marker) };
            lock(&self.synced).clear();
        }
        Ok(())
    }

    /// The root, if it is the one seen first.
    fn root(&self) -> Result<Directory, Failed> {
        let directory = self.open_root()?;
        let found = directory.identity()?;
        let mut volume = lock(&self.volume);
        match volume.device_and_inode {
            Some(known) if known == found => {}
            Some(known) if volume.marker.is_none() || volume.marker != read_marker(&directory) => {
                return Err(Failed::new(StoreErrorKind::RootMissing, replaced(&self.root, known, found)));
            }
            _ => volume.device_and_inode = Some(found),
        }
        if volume.marker.is_none() {
            volume.marker = read_marker(&directory);
        }
        Ok(directory)
    }

    /// A file beside where `key` will be, made by `create` from the directory and the object's name in it.
    fn new_file(
        &self,
        key: &Key,
        create: impl Fn(Directory, &str) -> io::Result<TempFile>,
    ) -> Result<TempFile, Failed> {
        for _ in 0..PRUNE_RACES_MAX {
            let root = self.root()?;
            match self.directory_of(&root, key).and_then(|directory| create(directory, key.file_name())) {
                // The directory was emptied and removed between two of our calls: make it again.
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.forget(parent(key)),
                result => return Ok(result?),
            }
        }
        Err(Failed::new(StoreErrorKind::Unavailable, "its directory is removed again and again".to_string()))
    }

    fn directory_of(&self, root: &Directory, key: &Key) -> io::Result<Directory> {
        let directory = match lock(&self.synced).contains(parent(key)) {
            true => root.open_below(parent(key))?,
            false => root.create_below(parent(key))?,
        };
        self.remember(parent(key));
        Ok(directory)
    }

    /// Refuses at once when the name is taken, so that a retry is answered on a full disk too.
    fn in_free_place(directory: Directory, name: &str) -> io::Result<TempFile> {
        match directory.stat_link(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => TempFile::create(directory),
            Err(error) => Err(error),
            Ok(_) => {
                directory.sync()?;
                Err(rustix::io::Errno::EXIST.into())
            }
        }
    }

    fn remember(&self, directory: &str) {
        let mut synced = lock(&self.synced);
        if synced.len() >= SYNCED_DIRECTORIES_MAX {
            synced.clear();
        }
        if !synced.contains(directory) {
            synced.insert(directory.to_string());
        }
    }

    fn forget(&self, directory: &str) {
        lock(&self.synced).remove(directory);
    }

    fn delete(&self, keys: &[Key]) -> Result<(), Failed> {
        let root = self.root()?;
        let mut by_directory: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for key in keys {
            by_directory.entry(parent(key)).or_default().push(key.file_name());
        }
        for (path, names) in by_directory {
            match root.open_below(path).and_then(|directory| directory.remove_files(&names)) {
                Ok(()) => self.prune(&root, path),
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Removes directories left empty, as if they had never been there: every segment once had one for its tails.
    fn prune(&self, root: &Directory, mut directory: &str) {
        while directory != "." && root.remove_empty_directory(directory).is_ok() {
            self.forget(directory);
            directory = directory.rsplit_once('/').map_or(".", |(above, _)| above);
        }
    }
}

/// The directory of an object, relative to the root.
fn parent(key: &Key) -> &str {
    key.as_str().rsplit_once('/').map_or(".", |(directory, _)| directory)
}

fn replaced(root: &Path, known: (u64, u64), found: (u64, u64)) -> String {
    let [known, found] = [known, found].map(|(device, inode)| format!("inode {inode} on device {device}"));
    format!("{} is another directory than before ({found}, was {known}): is its volume mounted?", root.display())
}

fn read_marker(root: &Directory) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    let file = root.open_file(layout::repository().as_str()).ok()?;
    file.take(64 << 10).read_to_end(&mut content).ok()?;
    Some(content)
}

fn read_exactly(mut file: File, range: Range<u64>) -> Result<Bytes, Failed> {
    let short = |size: u64| {
        let cause = format!("bytes {} to {} asked for, {size} there", range.start, range.end);
        Failed::new(StoreErrorKind::Corrupt, cause)
    };
    let size = file.metadata()?.len();
    // Before anything is allocated: the range may come from damaged data.
    if range.start > range.end || range.end > size {
        return Err(short(size));
    }
    let wanted = range.end - range.start;
    let mut content = Vec::with_capacity(usize::try_from(wanted).map_err(|_| short(size))?);
    file.seek(SeekFrom::Start(range.start))?;
    file.take(wanted).read_to_end(&mut content)?;
    if content.len() as u64 != wanted {
        return Err(short(range.start + content.len() as u64));
    }
    Ok(content.into())
}

/// One level, sorted. What cannot be one of our names is left out: temporary files, other prefixes' dots,
/// names that are not UTF-8, anything that is neither file nor directory.
fn list(directory: &Directory) -> Result<Vec<Entry>, Failed> {
    let mut entries = Vec::new();
    for name in names(directory)? {
        match directory.stat_link(&name) {
            Ok(stat) => entries.extend(entry(directory, name, &stat)),
            // Deleted, or named, while we were reading.
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
    entries.sort();
    sync_if_recent(directory)?;
    Ok(entries)
}

fn entry(directory: &Directory, name: String, stat: &rustix::fs::Stat) -> Option<Entry> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Some(Entry::Object { name, bytes: size(stat) }),
        FileType::Directory => Some(Entry::Directory(name)),
        // An operator may have moved a directory to another volume; an object is never a link.
        FileType::Symlink => directory.open_below(&name).is_ok().then_some(Entry::Directory(name)),
        _ => None,
    }
}

fn names(directory: &Directory) -> Result<Vec<String>, Failed> {
    let mut names = Vec::new();
    for found in directory.read()? {
        let found = found.map_err(io::Error::from)?;
        if let Ok(name) = found.file_name().to_str()
            && !name.starts_with('.')
        {
            names.push(name.to_string());
        }
    }
    Ok(names)
}

/// Whoever listed this directory may count on what it saw: a writer killed between rename and sync has left a
/// name that a power loss could still take back. Directories at rest are spared: an archive has many.
fn sync_if_recent(directory: &Directory) -> Result<(), Failed> {
    let modified = directory.stat(".")?.st_mtime;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let at_rest = modified >= 0 && (modified as u64).saturating_add(WRITTEN_BACK_AFTER.as_secs()) < now;
    match at_rest {
        true => Ok(()),
        false => Ok(directory.sync()?),
    }
}

fn clean_debris(shared: &Shared, older_than: Duration) -> Result<usize, Failed> {
    let root = shared.root()?;
    let cutoff = SystemTime::now().checked_sub(older_than).unwrap_or(SystemTime::UNIX_EPOCH);
    let (mut removed, mut seen) = (0, 0);
    // Popped from the end: names sort by time, so the newest directory, where a crash left its debris, is first.
    let mut waiting = vec![".".to_string()];
    while let Some(path) = waiting.pop().filter(|_| seen < DEBRIS_NAMES_MAX) {
        let Ok(directory) = root.open_below(&path) else { continue };
        let mut below: Vec<String> = Vec::new();
        let mut empty = true;
        for found in directory.read()? {
            let found = found.map_err(io::Error::from)?;
            let Ok(name) = found.file_name().to_str() else { continue };
            seen += 1;
            empty &= matches!(name, "." | "..");
            if name.starts_with(TEMP_PREFIX) {
                removed += usize::from(remove_if_old(&directory, name, cutoff));
            } else if !name.starts_with('.') && found.file_type() == FileType::Directory {
                below.push(if path == "." { name.to_string() } else { format!("{path}/{name}") });
            }
        }
        if empty {
            shared.prune(&root, &path);
        }
        below.sort();
        waiting.append(&mut below);
    }
    Ok(removed)
}

fn remove_if_old(directory: &Directory, name: &str, cutoff: SystemTime) -> bool {
    let modified = |file: File| file.metadata().and_then(|metadata| metadata.modified());
    let old = directory.open_file(name).and_then(modified).is_ok_and(|modified| modified <= cutoff);
    old && durable::remove_debris(directory, name).unwrap_or(false)
}

/// An object being written into a temporary file; nothing but the debris cleaner knows of it before `complete`.
#[derive(Debug)]
struct LocalUpload {
    backend: LocalBackend,
    key: Key,
    /// Gone while a call works on it, and for good after one that was dropped, ran out of time, or gave the object
    /// its name: the file is then removed.
    file: Option<UploadFile>,
}

#[derive(Debug)]
struct UploadFile {
    temp: TempFile,
    gathered: Vec<Bytes>,
    gathered_bytes: usize,
    written: u64,
}

impl UploadFile {
    /// Writes what was gathered. On an error the file is as before, and what was gathered still waits.
    fn flush(&mut self) -> Result<(), Failed> {
        if let Err(error) = self.temp.write(&self.gathered) {
            self.temp.file().set_len(self.written)?;
            self.temp.file().seek(SeekFrom::Start(self.written))?;
            return Err(error.into());
        }
        self.written += self.gathered_bytes as u64;
        self.gathered.clear();
        self.gathered_bytes = 0;
        Ok(())
    }

    fn read_back(&mut self, range: Range<u64>) -> Result<Bytes, Failed> {
        let content = read_exactly(self.temp.file().try_clone()?, range);
        // The clone shares its position with the file that is appended to.
        self.temp.file().seek(SeekFrom::Start(self.written))?;
        content
    }
}

impl LocalUpload {
    fn operation(&self, verb: &'static str, bytes: u64) -> Operation {
        self.backend.operation(verb, &self.key, bytes)
    }

    fn take(&mut self) -> Result<UploadFile, StoreError> {
        let lost = || Failed::new(StoreErrorKind::NotFound, "an earlier write of it was given up".to_string());
        self.file.take().ok_or_else(|| self.operation("store", 0).error(lost()))
    }
}

#[async_trait]
impl Upload for LocalUpload {
    async fn append(&mut self, part: Bytes) -> Result<(), StoreError> {
        let mut file = self.take()?;
        file.gathered_bytes += part.len();
        file.gathered.push(part);
        if file.gathered_bytes < UPLOAD_BUFFER_BYTES {
            self.file = Some(file);
            return Ok(());
        }
        let operation = self.operation("store", file.gathered_bytes as u64);
        let flushed = self.backend.run(operation, move |_| Ok((file.flush(), file))).await?;
        let (result, mut file) = flushed;
        if result.is_err()
            && let Some(part) = file.gathered.pop()
        {
            file.gathered_bytes -= part.len();
        }
        self.file = Some(file);
        result.map_err(|failed| self.operation("store", 0).error(failed))
    }

    async fn read_back(&mut self, range: Range<u64>) -> Result<Bytes, StoreError> {
        let mut file = self.take()?;
        let operation = self.operation("read", range.end.saturating_sub(range.start));
        // A range that is not there is an error, but does not spoil what was written.
        let (content, file) = self
            .backend
            .run(operation, move |_| {
                let content = file.flush().and_then(|()| file.read_back(range));
                Ok((content, file))
            })
            .await?;
        self.file = Some(file);
        content.map_err(|failed| self.operation("read", 0).error(failed))
    }

    async fn complete(&mut self) -> Result<(), StoreError> {
        let mut file = self.take()?;
        let operation = self.operation("store", file.written + file.gathered_bytes as u64);
        let key = self.key.clone();
        let completed = self
            .backend
            .run(operation, move |shared| {
                // The volume may be gone since the upload began.
                let flushed = shared.root().and_then(|_| file.flush());
                Ok(match flushed {
                    Ok(()) => Ok(file.temp.persist_new(key.file_name())?),
                    Err(failed) => Err((failed, file)),
                })
            })
            .await?;
        completed.map_err(|(failed, file)| {
            self.file = Some(file);
            self.operation("store", 0).error(failed)
        })
    }

    async fn abort(mut self: Box<Self>) -> Result<(), StoreError> {
        let file = self.file.take();
        let operation = self.operation("delete", 0);
        self.backend
            .run(operation, move |_| {
                drop(file);
                Ok(())
            })
            .await
    }
}

/// What is being done, for the deadline and for the error that may come of it.
#[derive(Debug)]
struct Operation {
    verb: &'static str,
    location: String,
    bytes: u64,
}

impl Operation {
    fn error(self, failed: Failed) -> StoreError {
        StoreError::new(failed.kind, self.verb, self.location, failed.cause)
    }
}

/// A failure inside an operation, before its place is added.
#[derive(Debug)]
struct Failed {
    kind: StoreErrorKind,
    cause: String,
}

impl Failed {
    fn new(kind: StoreErrorKind, cause: String) -> Failed {
        Failed { kind, cause }
    }

    /// Where "no such file" means the object. Everywhere else it is something that went away under us.
    fn of_object(error: io::Error) -> Failed {
        match is_absent(&error) {
            true => Failed::new(StoreErrorKind::NotFound, error.to_string()),
            false => error.into(),
        }
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        use io::ErrorKind as Io;
        let kind = match error.kind() {
            Io::AlreadyExists => StoreErrorKind::AlreadyExists,
            Io::StorageFull | Io::QuotaExceeded => StoreErrorKind::NoSpace,
            Io::PermissionDenied => StoreErrorKind::PermissionDenied,
            Io::ReadOnlyFilesystem => StoreErrorKind::ReadOnly,
            Io::Unsupported | Io::InvalidFilename => StoreErrorKind::Unsupported,
            // EIO, ESTALE, EMFILE, and a path that went away: they may pass.
            _ => StoreErrorKind::Unavailable,
        };
        Failed::new(kind, error.to_string())
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn size(stat: &rustix::fs::Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// These values are whole after every statement, so a panic elsewhere does not spoil them.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
