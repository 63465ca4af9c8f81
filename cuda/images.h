// The kernels that the extension carries: setup.py writes the table from what nvcc made.

#pragma once

struct Image {
    const char* source;  // a file of cuda/, e.g. "embed.cu"
    const char* arch;    // "sm_90a"
    const char* begin;   // a cubin
    const char* end;
};

extern const Image kImages[];
extern const int kImageCount;
