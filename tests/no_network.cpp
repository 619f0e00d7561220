// Preloaded by test_no_network.py: refuses internet sockets and look-ups of a process, and writes them to a file.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char* what) {
  const char* path = getenv("NO_NETWORK_LOG");
  const int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND, 0600) : -1;
  if (file < 0) abort();
  if (write(file, what, strlen(what)) < 0) abort();
  close(file);
}

extern "C" int socket(int domain, int type, int protocol) {
  if (domain != AF_INET && domain != AF_INET6 && domain != AF_PACKET)
    return reinterpret_cast<int (*)(int, int, int)>(dlsym(RTLD_NEXT, "socket"))(domain, type, protocol);
  note("socket\n");
  errno = EACCES;
  return -1;
}

extern "C" int getaddrinfo(const char*, const char*, const addrinfo*, addrinfo**) {
  note("getaddrinfo\n");
  return EAI_FAIL;
}

extern "C" hostent* gethostbyname(const char*) {
  note("gethostbyname\n");
  h_errno = NO_RECOVERY;
  return nullptr;
}
