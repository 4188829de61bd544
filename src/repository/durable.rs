//! Owns: how a file gets its name so that it survives a crash. The only file of the crate that syncs or renames.
//! Does not own: object names, error kinds, where the files lie (`local.rs`, the spool, `wal-get`).
//! Rests on `proto-notes/08-durability.md`. Everything here blocks: call it off the network task.
//!
//! ```text
//! step                          after kill -9          after power loss
//! 1 temp file created, written  debris, never listed   debris or nothing
//! 2 fsync(file)                 debris, never listed   debris: whole, or nothing
//! 3 rename(NOREPLACE)           the object, whole      the object, whole, or nothing
//! 4 fsync(directory)            the object             the object: only now is the caller told
//! ```
//!
//! * No name ever shows part of a file: it appears in step 3, after the bytes are on the disk.
//! * A name that is taken stays as it is. "Already exists" is answered only after the directory is synced, so
//!   that it, too, speaks of something durable: the process that made the name may have died before step 4.
//! * A file whose fsync failed is discarded, never synced again: the kernel may have dropped the dirty pages and
//!   would answer the second fsync with success. A failed fsync of the *directory* leaves the name: its content is
//!   whole, and another writer may already rely on it. It is not success; the retry meets "already exists" and
//!   syncs again, and journaling file systems keep failing until a remount shows what is really there.
//! * New directories are synced into their parents, up to the root, before anything is put into them.
//! * fsync, not fdatasync: a new inode has to be written in either case, so fdatasync would save nothing
//!   (it would flush size and extents too), while fsync covers owner and mode as well.
//!
//! Assumed of the disk: a completed flush is durable; a rename inside one directory is atomic; a file system that
//! cannot sync a directory (`EINVAL`) keeps its names by other means.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use bytes::Bytes;
use rustix::fs::{AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, RenameFlags, Uid};
use rustix::io::Errno;

/// Files that have no name of their own yet. Never listed as objects; removed when left over.
pub const TEMP_PREFIX: &str = ".seawall-tmp-";

/// Private: WAL holds every row of the database.
const FILE_MODE: Mode = Mode::from_raw_mode(0o600);
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o700);

/// An open directory. Work goes through the handle, not the path, so that a volume mounted or unmounted in the
/// middle of an operation cannot redirect its second half.
#[derive(Debug)]
pub struct Directory(OwnedFd);

impl Directory {
    pub fn open(path: &Path) -> io::Result<Directory> {
        Ok(Directory(rustix::fs::open(path, Self::flags(), Mode::empty())?))
    }

    pub fn open_below(&self, relative: impl AsRef<Path>) -> io::Result<Directory> {
        Ok(Directory(rustix::fs::openat(&self.0, relative.as_ref(), Self::flags(), Mode::empty())?))
    }

    fn flags() -> OFlags {
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC
    }

    /// Opens `relative`, creating what is missing, and makes every step of the path durable. Existing steps are
    /// synced too: whoever created them may have died before it did.
    pub fn create_below(&self, relative: impl AsRef<Path>) -> io::Result<Directory> {
        let mut current = self.open_below(".")?;
        for part in relative.as_ref().components() {
            let below = match current.open_below(part) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => current.create_child(part.as_os_str())?,
                opened => opened?,
            };
            current.sync()?;
            current = below;
        }
        Ok(current)
    }

    fn create_child(&self, name: &OsStr) -> io::Result<Directory> {
        match rustix::fs::mkdirat(&self.0, name, DIRECTORY_MODE) {
            Ok(()) | Err(Errno::EXIST) => self.open_below(name),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes the names in this directory durable: those added, those renamed, those removed.
    pub fn sync(&self) -> io::Result<()> {
        retry_interrupted(|| match rustix::fs::fsync(&self.0) {
            // A file system without the call (some network ones): its rename is all there is. PostgreSQL goes on too.
            Err(Errno::INVAL) => Ok(()),
            result => result,
        })
    }

    /// Device and inode: what tells a volume from the empty directory it was mounted on.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&self.0)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    pub fn stat(&self, relative: impl AsRef<Path>) -> io::Result<rustix::fs::Stat> {
        Ok(rustix::fs::statat(&self.0, relative.as_ref(), AtFlags::empty())?)
    }

    /// As `stat`, for what the name itself is: a symbolic link is not followed.
    pub fn stat_link(&self, relative: impl AsRef<Path>) -> io::Result<rustix::fs::Stat> {
        Ok(rustix::fs::statat(&self.0, relative.as_ref(), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// For reading. Neither a symbolic link nor a FIFO put in an object's place leads anywhere or blocks.
    pub fn open_file(&self, relative: impl AsRef<Path>) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.0, relative.as_ref(), flags, Mode::empty())?.into())
    }

    pub fn read(&self) -> io::Result<rustix::fs::Dir> {
        Ok(rustix::fs::Dir::read_from(&self.0)?)
    }

    /// Removes files durably: what was deleted first must not come back alone after a power loss. What is not there,
    /// or is a directory, is no file to remove.
    pub fn remove_files(&self, names: &[impl AsRef<Path>]) -> io::Result<()> {
        for name in names {
            match rustix::fs::unlinkat(&self.0, name.as_ref(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.sync()
    }

    /// A new, private file to append to and read; `AlreadyExists` when the name is taken. Neither its bytes nor its
    /// name are durable before [`flush_data`] and [`Directory::sync`].
    pub fn create_file(&self, name: impl AsRef<Path>) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.0, name.as_ref(), flags, FILE_MODE)?.into())
    }

    /// Holds an exclusive lock on the file of this name, which is created where it is missing, until the file is
    /// closed. `WouldBlock` while another process holds it.
    pub fn lock_file(&self, name: impl AsRef<Path>) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file: File = rustix::fs::openat(&self.0, name.as_ref(), flags, FILE_MODE)?.into();
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(file)
    }

    /// Holds an exclusive lock on the directory itself until what comes back is dropped. `WouldBlock` while another
    /// process holds it.
    pub fn lock(&self) -> io::Result<Directory> {
        let again = self.open_below(".")?;
        rustix::fs::flock(&again.0, FlockOperation::NonBlockingLockExclusive)?;
        Ok(again)
    }

    /// Removes a name. Not synced: for what does no harm when it comes back.
    pub fn unlink(&self, name: impl AsRef<Path>) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.0, name.as_ref(), AtFlags::empty())?)
    }

    /// Gives a file another name in the same directory, durably; `AlreadyExists` when that is taken.
    pub fn set_aside(&self, name: impl AsRef<Path>, other: impl AsRef<Path>) -> io::Result<()> {
        let (name, other) = (name.as_ref(), other.as_ref());
        match rustix::fs::renameat_with(&self.0, name, &self.0, other, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                rustix::fs::linkat(&self.0, name, &self.0, other, AtFlags::empty())?;
                rustix::fs::unlinkat(&self.0, name, AtFlags::empty())?;
            }
            result => result?,
        }
        self.sync()
    }

    /// Opens a directory directly below. A symbolic link in its place leads nowhere: `NotADirectory`.
    pub fn open_child(&self, name: impl AsRef<Path>) -> io::Result<Directory> {
        let flags = Self::flags() | OFlags::NOFOLLOW;
        Ok(Directory(rustix::fs::openat(&self.0, name.as_ref(), flags, Mode::empty())?))
    }

    /// Creates a directory directly below, with exactly this mode; `AlreadyExists` when the name is taken. Not synced.
    pub fn make_child(&self, name: impl AsRef<Path>, mode: Mode, owner: Option<(Uid, Gid)>) -> io::Result<Directory> {
        rustix::fs::mkdirat(&self.0, name.as_ref(), DIRECTORY_MODE)?;
        let child = self.open_child(name)?;
        child.set_access(mode, owner)?;
        Ok(child)
    }

    /// Gives the directory itself this mode and, where it is said, this owner.
    pub fn set_access(&self, mode: Mode, owner: Option<(Uid, Gid)>) -> io::Result<()> {
        if let Some((uid, gid)) = owner {
            rustix::fs::fchown(&self.0, Some(uid), Some(gid))?;
        }
        Ok(rustix::fs::fchmod(&self.0, mode)?)
    }

    /// A new file to write from its beginning, with exactly this mode; `AlreadyExists` when the name is taken, by a
    /// link too. Not synced.
    pub fn create_plain(&self, name: impl AsRef<Path>, mode: Mode, owner: Option<(Uid, Gid)>) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file: File = rustix::fs::openat(&self.0, name.as_ref(), flags, FILE_MODE)?.into();
        if let Some((uid, gid)) = owner {
            rustix::fs::fchown(&file, Some(uid), Some(gid))?;
        }
        if mode != FILE_MODE {
            rustix::fs::fchmod(&file, mode)?;
        }
        Ok(file)
    }

    /// A symbolic link of this name; `AlreadyExists` when the name is taken. Not synced.
    pub fn make_link(&self, name: impl AsRef<Path>, target: &Path, owner: Option<(Uid, Gid)>) -> io::Result<()> {
        rustix::fs::symlinkat(target, &self.0, name.as_ref())?;
        if let Some((uid, gid)) = owner {
            rustix::fs::chownat(&self.0, name.as_ref(), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    /// Where a symbolic link leads; `InvalidInput` for what is none.
    pub fn read_link(&self, name: impl AsRef<Path>) -> io::Result<std::path::PathBuf> {
        let target = rustix::fs::readlinkat(&self.0, name.as_ref(), Vec::new())?;
        let target: std::ffi::OsString = std::os::unix::ffi::OsStringExt::from_vec(target.into_bytes());
        Ok(target.into())
    }

    /// Gives a file that is on the disk its final name in the same directory, durably, in place of any other.
    pub fn put_in_place(&self, name: impl AsRef<Path>, other: impl AsRef<Path>) -> io::Result<()> {
        rustix::fs::renameat(&self.0, name.as_ref(), &self.0, other.as_ref())?;
        self.sync()
    }

    /// Makes everything below durable: each file and directory, and the names of them. Symbolic links are names, and
    /// are not followed. `watched` was opened on the same file system before the first byte was written.
    pub fn sync_tree(&self, watched: &Directory) -> io::Result<()> {
        match watched.tells_write_errors()? {
            true => retry_interrupted(|| rustix::fs::syncfs(&watched.0)),
            false => self.sync_each(),
        }
    }

    /// Whether one `syncfs` does what an fsync of each file would: since Linux 5.8 it answers with every failed write
    /// since the directory was opened, if the file system is one that writes everything out when asked to.
    fn tells_write_errors(&self) -> io::Result<bool> {
        const EXT: u64 = 0xEF53;
        const XFS: u64 = 0x5846_5342;
        const BTRFS: u64 = 0x9123_683E;
        const F2FS: u64 = 0xF2F5_2010;
        const TMPFS: u64 = 0x0102_1994;
        let known = [EXT, XFS, BTRFS, F2FS, TMPFS].contains(&u64::try_from(self.file_system()?.f_type).unwrap_or(0));
        let release = rustix::system::uname();
        let mut numbers = release.release().to_str().unwrap_or("").split(|c: char| !c.is_ascii_digit());
        let mut number = || numbers.next().and_then(|digits| digits.parse::<u32>().ok()).unwrap_or(0);
        Ok(known && (number(), number()) >= (5, 8))
    }

    fn sync_each(&self) -> io::Result<()> {
        for entry in self.read()? {
            let entry = entry?;
            let name = Path::new(<OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(entry.file_name().to_bytes()));
            if name == Path::new(".") || name == Path::new("..") {
                continue;
            }
            match FileType::from_raw_mode(self.stat_link(name)?.st_mode) {
                FileType::Directory => self.open_child(name)?.sync_each()?,
                FileType::RegularFile => {
                    let file = self.open_file(name)?;
                    retry_interrupted(|| rustix::fs::fsync(&file))?;
                }
                _ => {}
            }
        }
        self.sync()
    }

    /// What kind of file system this is (`statfs`), and its free bytes for us.
    pub fn file_system(&self) -> io::Result<rustix::fs::StatFs> {
        Ok(rustix::fs::fstatfs(&self.0)?)
    }

    /// Removes a subdirectory if it is empty. Not synced: an empty directory that returns does no harm.
    pub fn remove_empty_directory(&self, name: impl AsRef<Path>) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.0, name.as_ref(), AtFlags::REMOVEDIR)?)
    }
}

/// Creates a directory and its missing parents, durably. For a repository's root at `init`, nowhere else.
pub fn create_directory(path: &Path) -> io::Result<Directory> {
    let path = std::path::absolute(path)?;
    let below = path.strip_prefix("/").expect("an absolute path starts at the root");
    // Only the missing part: the directories above may not even be readable for us.
    let existing = below.ancestors().find(|parent| Path::new("/").join(parent).is_dir()).unwrap_or(Path::new(""));
    let from = existing.parent().filter(|parent| Directory::open(&Path::new("/").join(parent)).is_ok());
    let from = from.unwrap_or(existing);
    let missing = below.strip_prefix(from).expect("an ancestor is a prefix");
    Directory::open(&Path::new("/").join(from))?.create_below(missing)
}

/// A file being written, with a temporary name in the directory of its final one. Dropping it removes it.
#[derive(Debug)]
pub struct TempFile {
    directory: Directory,
    name: String,
    file: File,
    renamed: bool,
}

impl TempFile {
    pub fn create(directory: Directory) -> io::Result<TempFile> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = format!("{TEMP_PREFIX}{:016x}", fastrand::u64(..));
        let file: File = rustix::fs::openat(&directory.0, &name, flags, FILE_MODE)?.into();
        // Held until the file is closed: tells the cleaner of debris that somebody is still writing, whatever the
        // clock says. Where locks are not offered the age alone decides.
        let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        Ok(TempFile { directory, name, file, renamed: false })
    }

    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Appends all parts, in as few calls as the system allows.
    pub fn write(&mut self, parts: &[Bytes]) -> io::Result<()> {
        write_all_vectored(&mut self.file, parts)
    }

    /// Steps 2 to 4 of the module's table. `AlreadyExists` when the name is taken.
    pub fn persist_new(mut self, name: &str) -> io::Result<()> {
        retry_interrupted(|| rustix::fs::fsync(&self.file))?;
        match self.rename_to_free_name(name) {
            Ok(()) => {
                self.renamed = true;
                self.directory.sync()
            }
            Err(Errno::EXIST) => {
                self.directory.sync()?;
                Err(Errno::EXIST.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes the file to the disk and gives it a free name, **outside any repository**. The name itself is not synced:
    /// for files that can be had again, written early so that whoever syncs them next need not wait.
    pub fn place_flushed(mut self, name: &str) -> io::Result<()> {
        retry_interrupted(|| rustix::fs::fsync(&self.file))?;
        self.rename_to_free_name(name)?;
        self.renamed = true;
        Ok(())
    }

    fn rename_to_free_name(&self, name: &str) -> Result<(), Errno> {
        let directory = &self.directory.0;
        match rustix::fs::renameat_with(directory, &self.name, directory, name, RenameFlags::NOREPLACE) {
            // Old kernels, and file systems that know no flags (NFS among them).
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.link_to_free_name(name),
            result => result,
        }
    }

    /// As atomic as the rename; a crash in between leaves the temporary name as a second link.
    fn link_to_free_name(&self, name: &str) -> Result<(), Errno> {
        let directory = &self.directory.0;
        match rustix::fs::linkat(directory, &self.name, directory, name, AtFlags::empty()) {
            // How a file system without hard links answers: nothing is left that would not overwrite.
            Err(Errno::PERM) => Err(Errno::OPNOTSUPP),
            Err(error) => Err(error),
            Ok(()) => {
                let _ = rustix::fs::unlinkat(directory, &self.name, AtFlags::empty());
                Ok(())
            }
        }
    }

    pub fn rename_over(mut self, name: &OsStr) -> io::Result<Directory> {
        rustix::fs::renameat(&self.directory.0, &self.name, &self.directory.0, name)?;
        self.renamed = true;
        self.directory.open_below(".")
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if !self.renamed {
            // Nobody to tell, and nothing depends on it: what stays is debris under a name that is never listed.
            let _ = rustix::fs::unlinkat(&self.directory.0, &self.name, AtFlags::empty());
        }
    }
}

/// Removes a temporary file nobody is writing any more; `false` when somebody is.
pub fn remove_debris(directory: &Directory, name: &str) -> io::Result<bool> {
    let file = directory.open_file(name)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(false),
        _ => rustix::fs::unlinkat(&directory.0, name, AtFlags::empty()).map(|()| true).map_err(io::Error::from),
    }
}

/// What [`write_file_into_place`] promises after a power loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survives {
    /// Whole or absent after a kill; after a power loss, nothing is promised. For files that can be had again.
    Kill,
    /// File and name are on the disk when the call returns.
    PowerLoss,
}

/// Writes a file **outside any repository** and gives it its name, replacing what had it. Nobody sees a part of
/// it. The objects of a repository are never replaced: they go through [`TempFile::persist_new`].
pub fn write_file_into_place(
    destination: &Path,
    survives: Survives,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let name = destination.file_name().ok_or_else(|| io::Error::from(Errno::INVAL))?;
    let parent = destination.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temp = TempFile::create(Directory::open(parent)?)?;
    write(temp.file())?;
    if survives == Survives::PowerLoss {
        retry_interrupted(|| rustix::fs::fsync(&temp.file))?;
        return temp.rename_over(name)?.sync();
    }
    temp.rename_over(name).map(drop)
}

/// Gives a file **outside any repository** another place on its file system, replacing what had it. Nothing is synced:
/// for files that can be had again.
pub fn move_into_place(file: &Path, destination: &Path) -> io::Result<()> {
    Ok(rustix::fs::rename(file, destination)?)
}

/// Makes what was appended to a file durable. A file this fails for is lost: no second call on it proves anything.
///
/// fdatasync here, where objects get fsync: a file of the spool is synced many times while it grows, and times alone
/// are not worth a second write of the inode. The new size is part of what fdatasync flushes.
pub fn flush_data(file: &File) -> io::Result<()> {
    retry_interrupted(|| rustix::fs::fdatasync(file))
}

/// Makes a file durable, its owner and mode too. A file this fails for is lost: no second call on it proves anything.
pub fn sync_file(file: &File) -> io::Result<()> {
    retry_interrupted(|| rustix::fs::fsync(file))
}

fn write_all_vectored(file: &mut File, parts: &[Bytes]) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = parts.iter().filter(|part| !part.is_empty()).map(|p| IoSlice::new(p)).collect();
    let mut rest = slices.as_mut_slice();
    while !rest.is_empty() {
        match file.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut rest, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// `EINTR` says nothing was decided; it is not one of the failures after which a file is lost.
fn retry_interrupted(mut call: impl FnMut() -> Result<(), Errno>) -> io::Result<()> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn names(directory: &Path) -> Vec<String> {
        let names = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn temp(directory: &Path, content: &'static str) -> TempFile {
        let mut temp = TempFile::create(Directory::open(directory).unwrap()).unwrap();
        temp.write(&[Bytes::from_static(content.as_bytes())]).unwrap();
        temp
    }

    #[test]
    fn a_new_file_appears_under_its_name_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let first = temp(at, "first");
        assert!(names(at)[0].starts_with(TEMP_PREFIX));
        first.persist_new("name").unwrap();
        let error = temp(at, "second").persist_new("name").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        drop(temp(at, "third"));
        assert_eq!(names(at), ["name"]);
        assert_eq!(std::fs::read_to_string(at.join("name")).unwrap(), "first");
    }

    /// What NFS and old kernels get instead of renameat2.
    #[test]
    fn the_fallback_refuses_a_taken_name_too() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let first = temp(at, "first");
        assert_eq!(first.link_to_free_name("name"), Ok(()));
        drop(first);
        assert_eq!(temp(at, "second").link_to_free_name("name"), Err(Errno::EXIST));
        assert_eq!(names(at), ["name"]);
        assert_eq!(std::fs::read_to_string(at.join("name")).unwrap(), "first");
    }

    #[test]
    fn a_file_outside_the_repository_is_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let destination = directory.path().join("RECOVERYXLOG");
        for survives in [Survives::Kill, Survives::PowerLoss] {
            let content = format!("{survives:?}");
            write_file_into_place(&destination, survives, |file| file.write_all(content.as_bytes())).unwrap();
            assert_eq!(std::fs::read_to_string(&destination).unwrap(), content);
            assert_eq!(destination.metadata().unwrap().mode() & 0o777, 0o600);
        }
        let failed = write_file_into_place(&destination, Survives::Kill, |file| {
            file.write_all(b"half")?;
            Err(io::ErrorKind::TimedOut.into())
        });
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(std::fs::read_to_string(&destination).unwrap(), "PowerLoss");
        assert_eq!(names(directory.path()), ["RECOVERYXLOG"]);
    }

    #[test]
    fn a_link_at_the_destination_is_replaced_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let [outside, destination] = ["outside", "destination"].map(|name| directory.path().join(name));
        std::os::unix::fs::symlink(&outside, &destination).unwrap();
        write_file_into_place(&destination, Survives::Kill, |file| file.write_all(b"x")).unwrap();
        assert!(!outside.exists() && !destination.is_symlink());
    }

    #[test]
    fn directories_are_created_with_their_parents() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/c");
        let created = create_directory(&path).unwrap();
        assert_eq!(created.identity().unwrap(), create_directory(&path).unwrap().identity().unwrap());
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o700);
        std::fs::write(directory.path().join("file"), "").unwrap();
        assert_eq!(
            create_directory(&directory.path().join("file/x")).unwrap_err().kind(),
            io::ErrorKind::NotADirectory
        );
    }
}
